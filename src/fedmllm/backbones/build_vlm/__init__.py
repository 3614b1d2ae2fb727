"""Assembly of a small vision-language model from two published parts."""
