# sourced by login shells
PATH=/opt/expertmesh/bin:$PATH
