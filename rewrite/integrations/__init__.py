"""pocketize in the tools of others; each is imported only where its module is asked for."""
