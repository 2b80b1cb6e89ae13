"""What the stages are made of; knows nothing of flags, params.yaml or DVC."""
