"""The one-machine stack: broker, online store, Ray, our own processes, and the demo."""
