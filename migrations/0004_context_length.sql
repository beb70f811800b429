-- How many tokens a base model can see at once, so that a job whose rows may be longer is refused when it is posted, not after
-- it has trained on positions the model never learned. Models imported before this have none and are not held to one.
alter table base_models add column context_length bigint check (context_length > 0);
