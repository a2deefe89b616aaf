package control

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// writeConfig writes a configuration file and returns its path.
func writeConfig(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "blksnap.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestReadConfig(t *testing.T) {
	yes := true
	for _, tc := range []struct {
		name string
		text string
		want Config
		err  string // what the error says, after the file's name
	}{
		{name: "empty"},
		{name: "comments", text: "# nothing\n\n# at all\n"},
		{
			name: "everything",
			text: `
origin: [vda=/srv/vda.img, /dev/sdb]
mount: none
run: /r
listen: [unix:///s, tcp://localhost]
control: /c
store:
  - mem:1GiB
  - file:/f:10GiB
state: /s
tls-certs: /t
on-store-low: "true"
idle-timeout: 10m
allow-plaintext: true
allow-other: true
force: true
tracking-block: 4KiB
store-wait: 1m30s
`,
			want: Config{
				Origin: []string{"vda=/srv/vda.img", "/dev/sdb"}, Mount: "none", Run: "/r",
				Listen: []string{"unix:///s", "tcp://localhost"}, Control: "/c",
				Store: []string{"mem:1GiB", "file:/f:10GiB"}, State: "/s", TLSCerts: "/t", OnStoreLow: new("true"), IdleTimeout: new(10 * time.Minute), AllowPlaintext: &yes, AllowOther: &yes, Force: &yes,
				DeviceConfig: DeviceConfig{TrackingBlock: 4096, StoreWait: new(90 * time.Second)},
			},
		},
		{name: "list of one without brackets", text: "store: mem", want: Config{Store: []string{"mem"}}},
		{name: "bytes", text: "tracking-block: 65536", want: Config{DeviceConfig: DeviceConfig{TrackingBlock: 65536}}},
		{name: "unknown key", text: "mount: /m\nstroe: mem\n", err: `line 2: unknown key "stroe"`},
		{name: "a flag that is none of the settings", text: "config: /x", err: `line 1: unknown key "config"`},
		{name: "Go's name of a field", text: "AllowOther: true", err: `line 1: unknown key "AllowOther"`},
		{name: "key twice", text: "run: /a\nrun: /b\n", err: `line 2: mapping key "run" already defined at line 1`},
		{name: "wrong kind", text: "mount: [a, b]", err: "line 1: cannot unmarshal !!seq into string"},
		{name: "size", text: "tracking-block: many", err: `"many" is not a size such as 512, 64KiB, 10GiB or 1TiB`},
		{name: "duration", text: "store-wait: soon", err: "line 1: cannot unmarshal !!str `soon` into time.Duration"},
		{name: "not a mapping", text: "- a\n- b\n", err: "it is not a list of KEY: VALUE"},
		{name: "not YAML", text: "a: [", err: "line 1: did not find expected node content"},
		{name: "two documents", text: "run: /a\n---\nrun: /b\n", err: "it holds more than one document"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := writeConfig(t, tc.text)
			got, err := readConfig(path)
			if tc.err != "" {
				if want := "read configuration " + path + ": " + tc.err; err == nil || err.Error() != want {
					t.Errorf("error\n got %v\nwant %v", err, want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("configuration, -want +got:\n%s", diff)
			}
		})
	}
}

// TestFlagsWin merges a file with flags that say otherwise.
func TestFlagsWin(t *testing.T) {
	path := writeConfig(t, "origin: /f.img\nrun: /f\nstate: /f\nstore: [mem, file:/f]\nstore-wait: 1s\nidle-timeout: 2s\non-store-low: \"true\"\nallow-other: true\nforce: true\n")
	yes, no := true, false
	flags := Config{
		File:         path,
		Origin:       []string{"/flag.img"},
		State:        "/flag",
		Store:        []string{"dev:/flag"},
		OnStoreLow:   new(""),
		Force:        &no,
		DeviceConfig: DeviceConfig{TrackingBlock: 8192, StoreWait: new(time.Duration(0))},
	}
	got, err := flags.withFile()
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		File:         path,
		Origin:       []string{"/flag.img"},
		Run:          "/f",
		State:        "/flag",
		Store:        []string{"dev:/flag"},
		IdleTimeout:  new(2 * time.Second),
		OnStoreLow:   new(""),
		AllowOther:   &yes,
		Force:        &no,
		DeviceConfig: DeviceConfig{TrackingBlock: 8192, StoreWait: new(time.Duration(0))},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("flags and file, -want +got:\n%s", diff)
	}
}

func TestNamedConfigMustExist(t *testing.T) {
	_, err := Config{File: "/nonexistent/blksnap.yaml"}.withFile()
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a configuration file that was named and does not exist\n got %v\nwant %v", err, fs.ErrNotExist)
	}
}

func TestDeviceConfigCheck(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   DeviceConfig
		ok   bool
	}{
		{"default", DeviceConfig{}, true},
		{"smallest", DeviceConfig{TrackingBlock: 4096}, true},
		{"largest", DeviceConfig{TrackingBlock: 16 << 20}, true},
		{"too small", DeviceConfig{TrackingBlock: 2048}, false},
		{"too large", DeviceConfig{TrackingBlock: 32 << 20}, false},
		{"no power of two", DeviceConfig{TrackingBlock: 12288}, false},
		{"negative", DeviceConfig{TrackingBlock: -4096}, false},
		{"negative wait", DeviceConfig{StoreWait: new(time.Duration(-1))}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := tc.in.check(); (err == nil) != tc.ok {
				t.Errorf("check of %+v\n got %v\nwant success: %v", tc.in, err, tc.ok)
			}
		})
	}
}
