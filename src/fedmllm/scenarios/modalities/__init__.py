"""Missing modalities: members that complete or convert rows."""
