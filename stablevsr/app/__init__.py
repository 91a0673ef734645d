"""`stablevsr app`: upscaling in a web page on this machine. Needs Gradio, the extra `app`."""
