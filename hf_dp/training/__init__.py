"""The Trainer made private: the only place, with demo, that knows transformers."""
