"""The built-in heads, one file each; they are found through the entry-point group ``embedkit.heads`` like anyone's."""
