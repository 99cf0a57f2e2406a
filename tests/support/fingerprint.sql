-- The catalogue and the rows of a database as text that is the same on every version of the server: what tells two sides apart where
-- no pg_dump reads both. Of our own objects (schema rehome, triggers rehome_*) nothing; sequences run ahead by a margin, so of their
-- values nothing.  psql -qAtX -f fingerprint.sql
SET search_path = pg_catalog;
SET bytea_output = hex; SET datestyle = iso; SET timezone = 'UTC'; SET extra_float_digits = 3;
SELECT 'relation', n.nspname, c.relname, c.relkind, c.relpersistence, pg_get_userbyid(c.relowner), coalesce(c.relacl::text, ''), coalesce(obj_description(c.oid, 'pg_class'), '')
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'rehome') AND n.nspname !~ '^pg_' ORDER BY 2, 3, 4;
-- From 17 on a partition says itself that its parent's column is an identity.
SELECT 'column', a.attrelid::regclass, a.attnum - (SELECT count(*) FROM pg_attribute d WHERE d.attrelid = a.attrelid AND d.attisdropped AND d.attnum < a.attnum AND d.attnum > 0),
       a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, CASE WHEN c.relispartition THEN '' ELSE a.attidentity::text END, a.attgenerated, coalesce(pg_get_expr(d.adbin, d.adrelid), '')
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
 WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'rehome') AND n.nspname !~ '^pg_' ORDER BY 2::text, 3;
-- From 18 on NOT NULL is a constraint of its own; the columns have told it already.
SELECT 'constraint', conrelid::regclass, conname, pg_get_constraintdef(o.oid) FROM pg_constraint o JOIN pg_namespace n ON n.oid = connamespace
 WHERE contype <> 'n' AND conrelid <> 0 AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'rehome') ORDER BY 2::text, 3;
SELECT 'index', indexrelid::regclass, pg_get_indexdef(indexrelid) FROM pg_index i JOIN pg_class c ON c.oid = indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'rehome') AND n.nspname !~ '^pg_' ORDER BY 2::text;
SELECT 'trigger', tgrelid::regclass, tgname, tgenabled, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal AND tgname !~ '^rehome' ORDER BY 2::text, 3;
SELECT 'function', p.oid::regprocedure, pg_get_userbyid(proowner), coalesce(proacl::text, ''), md5(prosrc) FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
 WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'rehome') AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e') ORDER BY 2::text;
SELECT 'type', t.oid::regtype, typtype, coalesce((SELECT string_agg(enumlabel, ',' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid), '') FROM pg_type t JOIN pg_namespace n ON n.oid = typnamespace
 WHERE typtype IN ('e', 'd', 'r') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'rehome') ORDER BY 2::text;
SELECT 'sequence', schemaname, sequencename, increment_by, min_value, max_value, cycle FROM pg_sequences WHERE schemaname <> 'rehome' ORDER BY 2, 3;
SELECT 'extension', extname FROM pg_extension ORDER BY 2;
SELECT 'default privileges', pg_get_userbyid(defaclrole), defaclobjtype, defaclacl::text FROM pg_default_acl ORDER BY 2, 3;
SELECT 'large object', oid, md5(lo_get(oid)) FROM pg_largeobject_metadata ORDER BY 2;
-- Rows, those that a view shows too, whose text newer versions write differently (a materialized view is as old as its last refresh): order does not matter, so their hashes are added up.
SELECT format('SELECT %L, %L, count(*), coalesce(sum((''x'' || left(md5(t::text), 15))::bit(60)::bigint::numeric), 0) FROM %s%s t', 'rows', c.oid::regclass,
              CASE WHEN c.relkind = 'r' THEN 'ONLY ' ELSE '' END, c.oid::regclass)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'v') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'rehome') AND n.nspname !~ '^pg_' ORDER BY c.oid::regclass::text \gexec
