"""Methods that rewrite the task's rows before they are tokenised."""
