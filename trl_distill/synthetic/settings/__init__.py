"""Settings of the data engine by topic; `GenerateConfig` inherits them all."""
