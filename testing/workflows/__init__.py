"""The bundled workflows as tests run them: compared with their templates, taken apart, scaled down."""
