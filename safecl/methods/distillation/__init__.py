"""Methods that stay near a teacher on the task's own rows."""
