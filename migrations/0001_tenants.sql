-- Who may do what: a project owns files, jobs and models; a key acts for one project, or for the operator.

create table projects (
    id uuid primary key,
    name text not null constraint projects_name_unique unique,
    -- The second part of a fine-tuned model's name.
    organization text not null,
    created_at timestamptz not null default now()
);

create table api_keys (
    id uuid primary key,
    project_id uuid references projects (id),
    is_admin boolean not null,
    -- The key's first characters, so that a person can tell keys apart; the key itself is not kept.
    prefix text not null,
    sha256 bytea not null constraint api_keys_sha256_unique unique check (octet_length(sha256) = 32),
    created_at timestamptz not null default now(),
    revoked_at timestamptz,
    constraint api_keys_belong_to_someone check (is_admin or project_id is not null)
);
