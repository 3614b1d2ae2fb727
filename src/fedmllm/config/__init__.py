"""An experiment as a frozen value: TOML in, settings out."""
