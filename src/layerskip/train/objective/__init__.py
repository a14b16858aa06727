"""What training minimises: schedule, layer dropout, exit loss, what holds the model."""
