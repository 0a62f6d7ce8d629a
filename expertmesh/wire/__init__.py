"""What both ends of the data plane share: tensors on the wire, statuses, channel options."""
