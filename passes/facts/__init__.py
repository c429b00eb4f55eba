"""What else is known of a site: where its tensors come from and who else reads them."""
