"""What each task is (`tasks`), where its images come from (`sources`), decoded arrays (`store`)."""
