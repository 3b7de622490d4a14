"""Settings shared by more than one room: frozen, keyword-only dataclasses that check themselves."""
