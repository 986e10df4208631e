"""The kit of the page: sections, theme, wording, payload and templates. Knows no study."""
