//! What openapi.yaml says of all operations alike, and how it is put in order.

use holdfast_store::webhooks::TYPES;
use utoipa::Modify;
use utoipa::openapi::path::{Operation, OperationBuilder, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    Content, HeaderBuilder, HttpMethod, OpenApi as Spec, PathItem, Paths, PathsBuilder, Ref, RefOr, Required, Response,
    ResponseBuilder, schema,
};

/// Adds the security schemes, and to every operation the answers that any of them may give.
pub(crate) struct EveryOperation;

/// A tenant's key.
const PROJECT_KEY: &str = "project_key";
/// An operator's key.
const ADMIN_KEY: &str = "admin_key";

impl Modify for EveryOperation {
    fn modify(&self, openapi: &mut Spec) {
        let components = openapi.components.get_or_insert_default();
        let scheme = |description: &str| {
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(description)).build())
        };
        components.add_security_scheme(
            PROJECT_KEY,
            scheme("A key that acts for a project: made with `holdfast keys create --project` or `POST /admin/keys`"),
        );
        components.add_security_scheme(
            ADMIN_KEY,
            scheme("An operator's key: made with `holdfast keys create --admin` or `POST /admin/keys`"),
        );
        for (path, item) in &mut openapi.paths.paths {
            let is_admins = path.starts_with("/admin/") || path == "/metrics";
            let operations = [&mut item.get, &mut item.post, &mut item.put, &mut item.patch, &mut item.delete];
            for operation in operations.into_iter().flatten() {
                complete(operation, is_admins);
            }
        }
    }
}

fn complete(operation: &mut Operation, is_admins: bool) {
    // The two probes ask for no key and say so themselves.
    if operation.security.is_none() {
        let scheme = if is_admins { ADMIN_KEY } else { PROJECT_KEY };
        operation.security = Some(vec![SecurityRequirement::new(scheme, Vec::<String>::new())]);
        answer(operation, "400", error("A value of the request cannot be used"));
        answer(operation, "401", error("No key, or one that is unknown, revoked or expired"));
        answer(operation, "403", error("The key may not do this"));
        let limited = "The key has made as many requests as it may, or the project uses as much as it may";
        if operation.request_body.is_some() {
            answer(operation, "408", error("The body did not come in time"));
            answer(operation, "413", error("The body is larger than is taken"));
        }
        answer(operation, "429", error(limited));
        answer(operation, "500", error("The server failed; nothing was changed"));
        answer(operation, "503", error("The database or the object store does not answer, or the server is busy"));
    }
    let has_ranges = operation.responses.responses.contains_key("206");
    if has_ranges {
        ask(operation, "Range", "The bytes that are wanted, as `bytes=1000-`; one range is answered");
        ask(operation, "If-Range", "The `ETag` of what the client has the beginning of: of anything else the whole comes");
        ask(operation, "If-None-Match", "The `ETag` of what the client has: the answer is then 304");
    }
    let id = operation.operation_id.clone().unwrap_or_default();
    let is_documented = operation
        .parameters
        .iter()
        .flatten()
        .any(|parameter| matches!(parameter, RefOr::T(known) if known.name == IDEMPOTENCY_KEY));
    if REPEATABLE.contains(&id.as_str()) && !is_documented {
        ask(operation, IDEMPOTENCY_KEY, "The same key within a day is the same request: it is answered as it was, and done once");
    }
    let mut headers: Vec<(&str, &str, &str, schema::Type)> =
        // Every answer names the request, for the operator's logs.
        vec![("", "x-request-id", "Names the request; give it to the operator when something is wrong", schema::Type::String)];
    let wait = "Seconds after which the same request may do; absent where it never will";
    let never = "`false` where the same request would be refused again";
    headers.extend([
        ("429", "Retry-After", wait, schema::Type::Integer),
        ("429", "retry-after-ms", "The same in milliseconds", schema::Type::Integer),
        ("429", "x-should-retry", never, schema::Type::String),
        ("503", "Retry-After", wait, schema::Type::Integer),
        ("503", "retry-after-ms", "The same in milliseconds", schema::Type::Integer),
        ("307", "Location", "Where the bytes are, for some minutes", schema::Type::String),
    ]);
    if has_ranges {
        for status in ["200", "206", "304"] {
            headers.push((status, "ETag", "Names the bytes: the same bytes, the same tag", schema::Type::String));
        }
        headers.push(("200", "Accept-Ranges", "`bytes`", schema::Type::String));
        headers.push(("206", "Content-Range", "Which bytes of how many", schema::Type::String));
    }
    for (status, name, description, kind) in headers {
        let described = HeaderBuilder::new()
            .description(Some(description))
            .schema(Some(schema::ObjectBuilder::new().schema_type(kind)))
            .build();
        for (_, response) in operation.responses.responses.iter_mut().filter(|(code, _)| status.is_empty() || *code == status) {
            if let RefOr::T(Response { headers, .. }) = response {
                headers.insert(name.into(), RefOr::T(described.clone()));
            }
        }
    }
}

/// By which a client names a request that may come twice.
const IDEMPOTENCY_KEY: &str = "Idempotency-Key";

/// Operations that are done once however often the same request comes.
const REPEATABLE: [&str; 13] = [
    "cancel_fine_tuning_job",
    "cancel_upload",
    "create_api_key",
    "create_file",
    "create_fine_tuning_job",
    "create_member",
    "create_organization",
    "create_project",
    "create_upload",
    "create_webhook_endpoint",
    "pause_fine_tuning_job",
    "resume_fine_tuning_job",
    "rotate_webhook_secret",
];

/// Adds a header that a request may have.
fn ask(operation: &mut Operation, name: &str, description: &str) {
    // What HTTP and every client let through.
    let text = schema::ObjectBuilder::new()
        .schema_type(schema::Type::String)
        .min_length(Some(1))
        .max_length(Some(255))
        .pattern(Some("^[!-~]([ -~]*[!-~])?$"));
    let parameter = ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(text))
        .build();
    operation.parameters.get_or_insert_default().push(RefOr::T(parameter));
}

/// What the service sends to webhooks, a path item for each type.
pub(crate) fn webhooks() -> Paths {
    let of_type = |kind: &str| {
        let mut told = OperationBuilder::new()
            .operation_id(Some(format!("on_{}", kind.replace('.', "_"))))
            .summary(Some("A job has ended"))
            .description(Some(
                "Sent to each webhook that wants this type, again and again until it is answered with a status of 2xx.",
            ))
            .tag("webhooks")
            .request_body(Some(
                RequestBodyBuilder::new()
                    .content("application/json", Content::new(Some(Ref::from_schema_name("WebhookEvent"))))
                    .required(Some(Required::True))
                    .build(),
            ))
            .response("204", ResponseBuilder::new().description("It was taken; so is any other 2xx"))
            .build();
        ask(&mut told, "webhook-id", "Names what is told: the same for every try");
        ask(&mut told, "webhook-timestamp", "When it was sent, in Unix seconds");
        ask(
            &mut told,
            "webhook-signature",
            "Standard Webhooks' signature, `v1,…`; after a rotation that keeps the old secret two of them",
        );
        PathItem::new(HttpMethod::Post, told)
    };
    TYPES.iter().fold(PathsBuilder::new(), |paths, kind| paths.path(*kind, of_type(kind))).build()
}

/// Lists by names that read well in clients, their items as references: `FileList` of `File` instead of `List_File` with a
/// copy of it.
pub(crate) fn with_named_lists(spec: Spec) -> Spec {
    const GENERIC: &str = "List_";
    let renamed = || -> Option<Spec> {
        let mut json = serde_json::to_value(&spec).ok()?;
        let schemas = json.pointer_mut("/components/schemas")?.as_object_mut()?;
        let lists: Vec<String> = schemas.keys().filter(|name| name.starts_with(GENERIC)).cloned().collect();
        for list in &lists {
            let item = list.strip_prefix(GENERIC)?;
            let mut schema = schemas.remove(list)?;
            schema["properties"]["data"]["items"] = serde_json::json!({"$ref": format!("#/components/schemas/{item}")});
            schemas.insert(format!("{item}List"), schema);
        }
        let mut text = json.to_string();
        for list in &lists {
            let item = list.strip_prefix(GENERIC)?;
            text = text.replace(&format!("schemas/{list}\""), &format!("schemas/{item}List\""));
        }
        serde_json::from_str(&text).ok()
    };
    // What cannot be renamed is a contract all the same; a test says which it is.
    renamed().unwrap_or(spec)
}

fn error(description: &str) -> ResponseBuilder {
    let body = Content::new(Some(Ref::from_schema_name("ErrorBody")));
    ResponseBuilder::new().description(description).content("application/json", body)
}

fn answer(operation: &mut Operation, status: &str, response: ResponseBuilder) {
    operation.responses.responses.entry(status.to_owned()).or_insert_with(|| RefOr::T(response.build()));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    fn collect(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(target)) = map.get("$ref") {
                    found.insert(target.clone());
                }
                map.values().for_each(|value| collect(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_schema_is_referred_to() {
        let contract = serde_json::to_value(crate::openapi()).expect("JSON");
        let mut found = BTreeSet::new();
        collect(&contract, &mut found);
        for target in &found {
            let pointer = target.strip_prefix('#').expect("a reference within the contract");
            assert!(contract.pointer(pointer).is_some(), "{target} leads nowhere");
        }
        for name in contract["components"]["schemas"].as_object().expect("schemas").keys() {
            assert!(found.contains(&format!("#/components/schemas/{name}")), "nothing refers to {name}");
            assert!(!name.contains('_'), "{name} is no name for a client's type");
        }
    }
}
