"""Tables: CSV and Parquet files, whose columns become features."""
