"""The bundled workflows: made from ComfyUI's official templates, and turned into API-form prompts for headless runs."""
