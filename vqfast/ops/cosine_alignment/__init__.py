"""One operator: contract.py (what it takes), reference.py (plain PyTorch), api.py (the public function)."""
