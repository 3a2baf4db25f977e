"""StepSearch in JAX: step-wise PPO for language models that search."""
