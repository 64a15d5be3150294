#!/bin/sh
# Ask a running gateway by curl: whole, as a stream of server-sent events, and with an answer that must be JSON.
#
#     sh curl.sh http://127.0.0.1:3000 "What is the capital of France?"
#
# The question is put into JSON as it is: no quotation marks or backslashes in it.
set -eu
url=$1
question=$2
auth="authorization: Bearer ${API_KEY:-none}"
json="content-type: application/json"

curl --fail-with-body -sS "$url/v1/chat/completions" -H "$auth" -H "$json" -d '{
  "messages": [{"role": "user", "content": "'"$question"'"}], "max_tokens": 60, "temperature": 0
}'
echo

curl --fail-with-body -sSN "$url/generate_stream" -H "$auth" -H "$json" -d '{
  "inputs": "Once upon a time", "parameters": {"max_new_tokens": 20}
}'

curl --fail-with-body -sS "$url/generate" -H "$auth" -H "$json" -d '{
  "inputs": "A cat in JSON:",
  "parameters": {
    "max_new_tokens": 60,
    "grammar": {
      "type": "json",
      "value": {"type": "object", "properties": {"legs": {"type": "integer", "maximum": 9}}, "required": ["legs"]}
    }
  }
}'
echo
