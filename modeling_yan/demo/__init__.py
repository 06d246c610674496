"""A page in the browser that writes texts and shows how they come about; `page` needs gradio, `views` matplotlib."""
