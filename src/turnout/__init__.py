"""turnout: switch the model behind a served name while requests are running."""
