"""What several stages share. It knows nothing of the command line, params.yaml or DVC."""
