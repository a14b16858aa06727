"""How exits are taught: schedules, layer dropout, the loss at several exits, data, a trainer."""
