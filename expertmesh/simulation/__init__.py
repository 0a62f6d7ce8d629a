"""A cluster that does not fit here, hour by hour: the scaling policy and the planner against modelled replicas."""
