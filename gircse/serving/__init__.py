"""The server: OpenAI's requests and answers, batches of concurrent ones, replicas of the model, and the HTTP front."""
