"""What tests share: float64 oracles, cases, and what runs in processes of its own. Imported as ``helpers.<module>``."""
