"""MiniCPM-V 2.6 and MiniCPM-Llama3-V 2.5 for transformers 5."""
