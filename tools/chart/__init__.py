"""What of the Helm chart is generated: its values' schema, the defaults of groups, its README and the golden files."""
