"""Released TinyLLaVA weights in any of their layouts → one checkpoint that runs offline.

detect and rename (layouts) → configurations (configs) → adapter merged (lora) → `<image>` token (vocabulary) → how the
model is fed (describe) → shards, written tensor by tensor (shards)
"""
