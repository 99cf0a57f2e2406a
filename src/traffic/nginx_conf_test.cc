#include "traffic/nginx_conf.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace rehome {
namespace {

const Address kApp = Address::parse("127.0.0.1:8000"), kGate = Address::parse("127.0.0.1:8001");

NginxPlan plan(const std::string& site, const Address& application = kApp, const Address& gate = kGate) {
  NginxFiles files{"/etc/nginx/nginx.conf",
                   {{"/etc/nginx/nginx.conf", "events {}\nhttp { include conf.d/*.conf; }\n"}, {"/etc/nginx/conf.d/site.conf", site}}};
  return plan_nginx(files, {"/etc/nginx/conf.d/site.conf"}, application, gate, Millis(30000));
}

std::string edited(const std::string& site) {
  NginxPlan p = plan(site);
  for (const auto& problem : p.problems) EXPECT_FALSE(problem.fatal) << problem.where << ": " << problem.message;
  return p.edited["/etc/nginx/conf.d/site.conf"];
}

std::string refused(const std::string& site) {
  for (const auto& p : plan(site).problems)
    if (p.fatal) return p.id;
  return "";
}

TEST(NginxConf, ReadsQuotesCommentsVariablesAndNesting) {
  auto tree = parse_nginx("f", "a 'b c' \"d\\\"e\" ${x}y; # not; this {\nserver { location ~ \\.php$ { return 200; } }\nif ($a = \"b\") { set $q \"}\"; }");
  ASSERT_EQ(tree.size(), 3u);
  EXPECT_EQ(tree[0].words[1].text, "b c");
  EXPECT_EQ(tree[0].words[2].text, "d\"e");
  EXPECT_EQ(tree[0].words[3].text, "${x}y");
  EXPECT_EQ(tree[1].line, 2);
  EXPECT_EQ(tree[1].block[0].words[2].text, "\\.php$");
  EXPECT_EQ(tree[2].block[0].words[2].text, "}");
}

TEST(NginxConf, LuaHasBracesOfItsOwn) {
  auto tree = parse_nginx("f", "content_by_lua_block {\n t = { 'a}', \"\\\"{\" } -- it's {\n --[==[ }]] }\n ]==] s = [[}]] t[1] = {}\n}\nx y;\n");
  ASSERT_EQ(tree.size(), 2u);
  EXPECT_EQ(tree[1].line, 6);
  for (const char* text : {"a_by_lua_block { ", "a_by_lua_block { '} ", "a_by_lua_block { [[ } ", "a_by_lua_block { -- }"}) EXPECT_THROW(parse_nginx("f", text), Error) << text;
}

TEST(NginxConf, SaysWhereItDoesNotFit) {
  for (const char* text : {"a", "http {", "}", "a 'b;", "http { a }", ";"}) {
    try {
      parse_nginx("/f", std::string("x y;\n") + text);
      ADD_FAILURE() << text;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("/f:2"), std::string::npos) << e.what();
    }
  }
}

TEST(NginxConf, LeadsAnUpstreamThroughTheGateAndTakesKeepaliveOut) {
  EXPECT_EQ(edited("# the shop\nupstream shop {\n  server localhost:8000 max_fails=0; # one\n  keepalive 16;\n  keepalive_timeout 5s;\n}\n"
                   "server { location / { proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_pass http://shop; } }\n"),
            "# the shop\nupstream shop {\n  server 127.0.0.1:8001 max_fails=0; # one\n  \n  \n}\n"
            "server { location / { proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_pass http://shop; } }\n");
}

TEST(NginxConf, SaysKeepaliveOffToAnNginxThatKeepsByItself) {
  auto now = [](const std::string& site) {
    NginxFiles files{"/n.conf", {{"/n.conf", site}}};
    return plan_nginx(files, {"/n.conf"}, kApp, kGate, Millis(30000), true).edited["/n.conf"];
  };
  EXPECT_EQ(now("http { upstream a { server 127.0.0.1:8000; keepalive 16 local; keepalive_timeout 5s; ip_hash; } upstream b { server 127.0.0.1:9000; } }"),
            "http { upstream a { server 127.0.0.1:8001; keepalive 0;  ip_hash; } upstream b { server 127.0.0.1:9000; } }");
  EXPECT_EQ(now("http { upstream a { server 127.0.0.1:8000; ip_hash; } }"), "http { upstream a { server 127.0.0.1:8001; ip_hash; keepalive 0; } }");
  EXPECT_FALSE(nginx_keeps_upstreams("nginx version: nginx/1.22.1\n"));
  EXPECT_FALSE(nginx_keeps_upstreams("nginx version: nginx/1.29.6 (Ubuntu)\n"));
  EXPECT_FALSE(nginx_keeps_upstreams("freenginx version: freenginx/1.31.0\n"));
  EXPECT_TRUE(nginx_keeps_upstreams("nginx version: nginx/1.29.7\n"));
  EXPECT_TRUE(nginx_keeps_upstreams("nginx version: openresty/1.31.2.1\n"));
}

TEST(NginxConf, OneFileUnderTwoNamesIsEditedOnce) {
  NginxFiles files{"/e/nginx.conf",
                   {{"/e/nginx.conf", "http { include a.conf; server { include b.conf; } }"},
                    {"/e/a.conf", "proxy_set_header Host h; server { location / { proxy_pass http://127.0.0.1:8000; } }"},
                    {"/e/b.conf", "proxy_set_header Host h; server { location / { proxy_pass http://127.0.0.1:8000; } }\n"}},
                   {{"/e/b.conf", "/e/a.conf"}}};
  NginxPlan p = plan_nginx(files, {"/e/a.conf"}, kApp, kGate, Millis(1000));
  EXPECT_TRUE(p.problems.empty());
  ASSERT_EQ(p.edited.size(), 1u);
  EXPECT_NE(p.edited["/e/a.conf"].find("http://127.0.0.1:8001;"), std::string::npos);
}

TEST(NginxConf, KeepsTheHostThatTheApplicationSees) {
  EXPECT_EQ(edited("server { location / { proxy_set_header Host $host; proxy_pass http://127.0.0.1:8000/x; } }"),
            "server { location / { proxy_set_header Host $host; proxy_pass http://127.0.0.1:8001/x; proxy_redirect http://127.0.0.1:8000/x /; } }");
  EXPECT_EQ(edited("server { location /a/ { proxy_pass http://127.0.0.1:8000/; } }"),
            "server { location /a/ { proxy_pass http://127.0.0.1:8001/; proxy_set_header Host 127.0.0.1:8000;"
            " proxy_redirect http://127.0.0.1:8000/ /a/; } }");
  // A line of its own in the location ends the inheritance from the server: that is copied.
  EXPECT_EQ(edited("server { proxy_set_header X-A b; proxy_redirect off; location / { proxy_pass \"http://127.0.0.1:8000\"; } }"),
            "server { proxy_set_header X-A b; proxy_redirect off; location / { proxy_pass \"http://127.0.0.1:8001\"; proxy_set_header X-A b;"
            " proxy_set_header Host 127.0.0.1:8000; } }");
}

// nginx refuses `proxy_redirect default` in either.
TEST(NginxConf, KeepsRedirectsOnlyWhereNginxTakesThat) {
  EXPECT_EQ(edited("server { location /x { proxy_pass http://127.0.0.1:8000/v1$is_args$args; } }"),
            "server { location /x { proxy_pass http://127.0.0.1:8001/v1$is_args$args; proxy_set_header Host 127.0.0.1:8000; } }");
  EXPECT_EQ(edited("server { location /x { if ($arg_a) { proxy_pass http://127.0.0.1:8000; } } }"),
            "server { location /x { proxy_set_header Host 127.0.0.1:8000; proxy_redirect http://127.0.0.1:8000/ /; if ($arg_a) { proxy_pass http://127.0.0.1:8001; } } }");
}

TEST(NginxConf, AVariableBehindAWholeAddressIsTheUri) {
  EXPECT_EQ(edited("server { location / { proxy_set_header Host h; proxy_pass http://127.0.0.1:8000$request_uri; } location /i { proxy_pass http://127.0.0.1:9000$uri; } }"),
            "server { location / { proxy_set_header Host h; proxy_pass http://127.0.0.1:8001$request_uri; } location /i { proxy_pass http://127.0.0.1:9000$uri; } }");
  EXPECT_EQ(edited("server { location ~ ^/a(/.*) { proxy_set_header Host h; proxy_pass http://[::]:8000$1$is_args$args; } }"),
            "server { location ~ ^/a(/.*) { proxy_set_header Host h; proxy_pass http://127.0.0.1:8001$1$is_args$args; } }");
  for (const char* word : {"http://$host:8000", "http://127.0.0.1:$port", "http://shop$request_uri", "http://$x"})
    EXPECT_NE(split_nginx_target(word).address.find('$'), std::string::npos) << word;
}

TEST(NginxConf, UnixSocketsOnBothEnds) {
  NginxPlan p = plan("upstream a { server unix:/run/app.sock; } server { location / { proxy_set_header Host h; proxy_pass http://unix:/run/app.sock:/x; } }",
                     Address::parse("unix:/run/app.sock"), Address::parse("unix:/run/gate.sock"));
  EXPECT_EQ(p.edited["/etc/nginx/conf.d/site.conf"],
            "upstream a { server unix:/run/gate.sock; } server { location / { proxy_set_header Host h; proxy_pass http://unix:/run/gate.sock:/x; proxy_redirect http://unix:/run/app.sock:/x /; } }");
}

TEST(NginxConf, Ipv6OnBothEnds) {
  NginxPlan p = plan("upstream a { server [::1]:8000; } server { listen [::]:80; location / { proxy_set_header Host h; proxy_pass http://[::1]:8000/x; } }",
                     Address::parse("[::1]:8000"), Address::parse("[::1]:8001"));
  EXPECT_EQ(p.edited["/etc/nginx/conf.d/site.conf"],
            "upstream a { server [::1]:8001; } server { listen [::]:80; location / { proxy_set_header Host h; proxy_pass http://[::1]:8001/x; proxy_redirect http://[::1]:8000/x /; } }");
}

TEST(NginxConf, OtherApplicationsAreLeftAlone) {
  EXPECT_EQ(edited("upstream a { server 127.0.0.1:8000; } upstream b { server 127.0.0.1:9000; server 10.0.0.1:8000; keepalive 4; }"),
            "upstream a { server 127.0.0.1:8001; } upstream b { server 127.0.0.1:9000; server 10.0.0.1:8000; keepalive 4; }");
}

TEST(NginxConf, RefusesWhatCannotBeHeld) {
  EXPECT_EQ(refused("upstream a { server 127.0.0.1:8000; server 127.0.0.1:8002 backup; }"), "nginx.several_servers");
  EXPECT_EQ(refused("upstream a { server 127.0.0.1:8000 weight=3; server 10.0.0.7:8000 weight=1; }"), "nginx.several_servers");
  EXPECT_EQ(refused("upstream a { server 127.0.0.1:8000; server 10.0.0.7:8000 down; }"), "");
  EXPECT_EQ(refused("server { location / { proxy_pass http://127.0.0.1:9000; } }"), "nginx.no_way");
  EXPECT_EQ(refused("server { location / { set $b 127.0.0.1:8000; proxy_pass http://$b; } }"), "nginx.no_way");
}

TEST(NginxConf, AVariableThatMayLeadPastTheGateIsSaid) {
  const std::string led = "upstream a { server 127.0.0.1:8000; } server { location / { proxy_set_header Host h; proxy_pass http://a; } ";
  auto said = [&](const std::string& more) {
    std::string all;
    for (const auto& p : plan(led + more).problems) all += (p.fatal ? "error " : "warning ") + p.id + " ";
    return all;
  };
  EXPECT_EQ(said("}"), "");
  EXPECT_EQ(said("location /x { set $b 127.0.0.1:8000; proxy_pass http://$b; } }"), "error nginx.variable ");
  EXPECT_EQ(said("location /x { set $ip localhost; set $b http://${ip}:8000; proxy_pass $b; } }"), "error nginx.variable ");
  EXPECT_EQ(said("location /x { proxy_pass http://$b; } } map $http_x $b { default 10.0.0.1:80; beta 127.0.0.1:8000; }"), "error nginx.variable ");
  EXPECT_EQ(said("location /x { proxy_pass http://$b; } } map $http_x $b { default 10.0.0.1:80; }"), "warning nginx.variable ");
  EXPECT_EQ(said("location /x { proxy_pass http://$http_x; } }"), "warning nginx.variable ");
  EXPECT_EQ(said("location /x { proxy_pass http://$b; } location /y { proxy_pass http://$c; } }"), "warning nginx.variable ");
  EXPECT_EQ(said("location /x { proxy_pass http://$b; }\n location /y { proxy_pass http://$c; } }"), "warning nginx.variable warning nginx.variable ");
  EXPECT_EQ(said("location /x { proxy_pass http://c$request_uri; } }"), "warning nginx.variable ");
  EXPECT_EQ(said("location /x { proxy_pass http://a$request_uri; } location /y { proxy_pass http://$b$uri; } } map $http_x $b { default a; }"), "");
  // The application's port by another address or name: it may be this host's own.
  EXPECT_EQ(said("location /x { proxy_pass http://10.0.0.1:8000; } }"), "warning nginx.same_port ");
  EXPECT_EQ(said("location /x { proxy_pass http://c; } } upstream c { server app.local:8000; server 10.0.0.2:9000; }"), "warning nginx.same_port ");
  EXPECT_EQ(said("location /x { proxy_pass http://10.0.0.1; } }"), "");
  // Upstreams only: they are edited.
  EXPECT_EQ(said("location /x { proxy_pass http://$b; } } upstream c { server 127.0.0.1:9000; } map $http_x $b { default a; x c; }"), "");
}

TEST(NginxConf, AMapsOtherFilesAreReadToo) {
  NginxFiles files{"/e/nginx.conf",
                   {{"/e/nginx.conf", "http { include a.conf; }"},
                    {"/e/a.conf", "upstream a { server 127.0.0.1:8000; } map $http_x $b { include b.map; } server { location / { proxy_pass http://$b; } }"},
                    {"/e/b.map", "default a; beta 127.0.0.1:8000;"}}};
  NginxPlan p = plan_nginx(files, {"/e/a.conf"}, kApp, kGate, Millis(1000));
  ASSERT_EQ(p.problems.size(), 1u);
  EXPECT_TRUE(p.problems[0].fatal);
  EXPECT_EQ(p.problems[0].id, "nginx.variable");
}

TEST(NginxConf, SaysThatACacheIsNotFoundAgain) {
  auto said = [](const std::string& more) {
    std::string all;
    for (const auto& p : plan("proxy_cache_path /c keys_zone=z:1m; proxy_cache z; server { " + more + " location / { proxy_pass http://127.0.0.1:8000; } }").problems) all += p.id + " ";
    return all;
  };
  EXPECT_EQ(said(""), "nginx.cache ");
  EXPECT_EQ(said("proxy_cache off;"), "");
  EXPECT_EQ(said("proxy_cache_key $host$request_uri;"), "");
}

TEST(NginxConf, FindsAWayPastTheGateInAnotherFile) {
  NginxFiles files{"/e/nginx.conf",
                   {{"/e/nginx.conf", "http { include a.conf; include b.conf; }"},
                    {"/e/a.conf", "upstream a { server 127.0.0.1:8000; }"},
                    {"/e/b.conf", "server { location / { proxy_pass http://127.0.0.1:8000; } }"}}};
  NginxPlan p = plan_nginx(files, {"/e/a.conf"}, kApp, kGate, Millis(1000));
  ASSERT_EQ(p.problems.size(), 1u);
  EXPECT_EQ(p.problems[0].id, "nginx.other_file");
  EXPECT_EQ(p.problems[0].where, "/e/b.conf:1");
}

TEST(NginxConf, WarnsOfATimeoutBelowTheLongestWait) {
  NginxPlan p = plan("server { proxy_read_timeout 5s; location / { proxy_set_header Host h; proxy_pass http://127.0.0.1:8000; } }");
  ASSERT_EQ(p.problems.size(), 1u);
  EXPECT_FALSE(p.problems[0].fatal);
  EXPECT_EQ(p.problems[0].id, "nginx.timeout");
}

TEST(NginxConf, WarnsOfTheTimeoutThatHoldsWhereNoneIsWritten) {
  auto said = [](const std::string& site, Millis wait) {
    NginxFiles files{"/n.conf", {{"/n.conf", "http { " + site + " }"}}};
    std::string all;
    for (const auto& p : plan_nginx(files, {"/n.conf"}, kApp, kGate, wait).problems) all += p.id + " " + p.message.substr(0, 30) + ";";
    return all;
  };
  const std::string direct = "server { location / { fastcgi_pass 127.0.0.1:8000; } location /o { fastcgi_pass 127.0.0.1:9000; } }";
  EXPECT_EQ(said(direct, Millis(60'000)), "");
  EXPECT_EQ(said(direct, Millis(120'000)), "nginx.timeout there is no fastcgi_read_timeo;");
  EXPECT_EQ(said("fastcgi_read_timeout 3m; " + direct, Millis(120'000)), "");
  EXPECT_EQ(said("fastcgi_read_timeout 90s; " + direct, Millis(120'000)), "nginx.timeout fastcgi_read_timeout 90s: a re;");
  EXPECT_EQ(said("server { location / { proxy_pass http://a$uri; } } upstream a { server 127.0.0.1:8000; }", Millis(120'000)), "nginx.timeout there is no proxy_read_timeout;");
}

TEST(NginxConf, Times) {
  EXPECT_EQ(parse_nginx_time("60"), Millis(60000));
  EXPECT_EQ(parse_nginx_time("1m 30s"), Millis(90000));
  EXPECT_EQ(parse_nginx_time("500ms"), Millis(500));
  EXPECT_FALSE(parse_nginx_time("$x"));
}

}  // namespace
}  // namespace rehome
