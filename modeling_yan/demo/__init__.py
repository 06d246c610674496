"""A page in the browser that generates texts and shows how; `page` needs gradio, `views` matplotlib."""
