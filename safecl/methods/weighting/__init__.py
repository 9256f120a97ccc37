"""Methods that weigh the task's rows and tokens."""
