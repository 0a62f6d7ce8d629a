"""Which experts belong together in a group: loads, plans and the planner, all pure functions of plain values."""
