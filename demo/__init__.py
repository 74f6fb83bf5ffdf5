"""The Gradio demo. Not built yet."""
