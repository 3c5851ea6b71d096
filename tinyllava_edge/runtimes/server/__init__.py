"""`tinyllava-edge serve`: one bundle behind OpenAI's chat API, and a chat page, on the device itself.

serve        sockets, signals, loading and draining
  protocol   uvicorn's HTTP/1.1, with time limits on request heads and idle connections
  app        routes; guard (host, origin, key) in front of them
    chat     one answer: request → engine → reply or stream
      body   a request's bytes under limits       openai_api   JSON → Request
      bridge the engine's threads → the event loop     replies  Answer → JSON and events
    metrics  Prometheus        page   static files
"""
