-- What a request that may come twice has made. Clients try again by themselves when a connection breaks, and most send no key
-- for it; then the same body from the same API key within a short time is the same request.

create table made_requests (
    key_id uuid not null references api_keys (id),
    -- Method and path.
    operation text not null,
    -- SHA-256 of the client's idempotency key, or of the body where it sent none.
    token bytea not null check (octet_length(token) = 32),
    body_sha256 bytea not null check (octet_length(body_sha256) = 32),
    made uuid not null,
    made_at timestamptz not null default now(),
    primary key (key_id, operation, token)
);
create index made_requests_made_at on made_requests (made_at);
