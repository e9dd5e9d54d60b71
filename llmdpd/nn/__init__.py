"""Parts of networks that methods share."""
