//! The definitions of the two kinds of report.
//!
//! Owns names, columns of the times and schemas. Does not know what is in a report.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, CustomResourceDefinitionNames, CustomResourceDefinitionSpec,
    CustomResourceDefinitionVersion, CustomResourceValidation, JSONSchemaProps,
};
use kube::Resource as _;
use kube::core::ObjectMeta;
use kube::core::params::{GetParams, Patch};
use kube::core::request::Error as BuildError;
use schemars::Schema;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;

use super::super::{Built, CRDS, GROUP, Request, apply};
use super::{Dated, Report, VERSION, column};

/// Creates the definition of a kind, or changes it to this version.
pub(crate) fn apply_definition<R: Report>() -> Built<CustomResourceDefinition> {
    let name = definition_name::<R>();
    let definition = definition::<R>().map_err(BuildError::SerializeBody)?;
    let http = definitions().patch(&name, &apply(), &Patch::Apply(&definition))?;
    Ok(Request::new(http, format!("CustomResourceDefinition {name}")).granted_by(CRDS))
}

/// Reads the definition of a kind.
pub(crate) fn get_definition<R: Report>() -> Built<CustomResourceDefinition> {
    let name = definition_name::<R>();
    let http = definitions().get(&name, &GetParams::default())?;
    Ok(Request::new(http, format!("CustomResourceDefinition {name}")).granted_by(CRDS))
}

/// Whether the server serves the kind that is defined here.
pub(crate) fn is_established(definition: &CustomResourceDefinition) -> bool {
    let conditions = definition.status.as_ref().and_then(|status| status.conditions.as_deref());
    let conditions = conditions.unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Established" && condition.status == "True")
}

fn definitions() -> kube::core::Request {
    kube::core::Request::new(CustomResourceDefinition::url_path(&(), None))
}

fn definition_name<R: Report>() -> String {
    format!("{}.{GROUP}", R::PLURAL)
}

/// Returns the CustomResourceDefinition of a kind.
///
/// # Errors
/// Never in practice: the schema of our types is one that Kubernetes allows.
pub(crate) fn definition<R: Report>() -> Result<CustomResourceDefinition, serde_json::Error> {
    let mut columns = R::columns();
    columns.push(column("Updated", "string", ".last_updated", "When the report was made, in UTC"));
    columns.push(column("Age", "date", ".metadata.creationTimestamp", "When the first report was made"));
    let version = CustomResourceDefinitionVersion {
        name: VERSION.into(),
        served: true,
        storage: true,
        additional_printer_columns: Some(columns),
        schema: Some(CustomResourceValidation { open_api_v3_schema: Some(schema::<R>()?) }),
        ..Default::default()
    };
    let names = CustomResourceDefinitionNames {
        kind: R::KIND.into(),
        list_kind: Some(format!("{}List", R::KIND)),
        plural: R::PLURAL.into(),
        singular: Some(R::KIND.to_lowercase()),
        short_names: Some(vec![R::SHORT.into()]),
        ..Default::default()
    };
    Ok(CustomResourceDefinition {
        metadata: ObjectMeta { name: Some(definition_name::<R>()), ..Default::default() },
        spec: CustomResourceDefinitionSpec {
            group: GROUP.into(),
            scope: "Namespaced".into(),
            names,
            versions: vec![version],
            ..Default::default()
        },
        status: None,
    })
}

/// Returns the structural schema of a kind. No field is required, and nothing says more than the type of a field, so
/// that an older definition accepts the objects of a newer kcm with fewer fields, and the other way round.
fn schema<R: Report>() -> Result<JSONSchemaProps, serde_json::Error> {
    let settings = SchemaSettings::openapi3().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let settings = settings.with_transform(RecursiveTransform(|schema: &mut Schema| {
        for keyword in ["title", "description", "default", "required", "nullable"] {
            schema.remove(keyword);
        }
    }));
    serde_json::from_value(settings.into_generator().into_root_schema_for::<Dated<R>>().to_value())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::NodeReport;
    use super::*;

    #[test]
    fn a_kind_is_served_once_its_definition_is_established() {
        let mut definition = definition::<NodeReport>().unwrap();
        assert!(!is_established(&definition));
        for (status, expected) in [("False", false), ("True", true)] {
            let conditions = json!({ "conditions": [{ "type": "Established", "status": status }] });
            definition.status = serde_json::from_value(conditions).unwrap();
            assert_eq!(is_established(&definition), expected);
        }
    }
}
