"""From one division of experts into groups to another, on a running cluster and with no failed request."""
