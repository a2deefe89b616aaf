package control

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"blksnap/store"
)

func TestPlaces(t *testing.T) {
	home := t.TempDir()
	for _, tc := range []struct {
		name string
		uid  int
		env  map[string]string
		want places
	}{
		{"root", 0, map[string]string{"XDG_RUNTIME_DIR": "/run/user/0", "HOME": "/root"},
			places{"/run/blksnap", "/run/blksnapd", "/var/lib/blksnap", ""}},
		{"user with a session", 7, map[string]string{"XDG_RUNTIME_DIR": "/run/user/7", "XDG_STATE_HOME": "/s", "HOME": home},
			places{"/run/user/7/blksnap", "/run/user/7/blksnapd", "/s/blksnap", ""}},
		{"user without one", 7, map[string]string{"HOME": home},
			places{"/tmp/blksnap-7/blksnap", "/tmp/blksnap-7/blksnapd", home + "/.local/state/blksnap", "/tmp/blksnap-7"}},
		{"user without a home", 7, map[string]string{"HOME": "/nonexistent"},
			places{"/tmp/blksnap-7/blksnap", "/tmp/blksnap-7/blksnapd", "/tmp/blksnap-7/blksnap-state", "/tmp/blksnap-7"}},
		{"nothing", 7, nil,
			places{"/tmp/blksnap-7/blksnap", "/tmp/blksnap-7/blksnapd", "/tmp/blksnap-7/blksnap-state", "/tmp/blksnap-7"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := placesOf(tc.uid, func(k string) string { return tc.env[k] })
			if got != tc.want {
				t.Errorf("places\n got %+v\nwant %+v", got, tc.want)
			}
		})
	}
}

func TestSettle(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	file := writeConfig(t, "run: /f/run\nstate: /f/state\nmount: none\n")
	t.Run("from flags", func(t *testing.T) {
		got, err := settle(Config{File: writeConfig(t, ""), Origin: []string{"vda=/a.img"}, Mount: "/m", Run: "/r", State: "/s"}, false)
		if err != nil {
			t.Fatal(err)
		}
		want := settings{
			mount: "/m", run: "/r", state: "/s", control: "/r/control.sock",
			listen:  []string{"unix:///r/nbd.sock"},
			stores:  []store.Spec{{Kind: store.File, Path: "/s/snapstore"}},
			devices: []DeviceRequest{{"vda", "/a.img", DeviceConfig{}}},
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(settings{})); diff != "" {
			t.Errorf("settings, -want +got:\n%s", diff)
		}
	})
	t.Run("from a file", func(t *testing.T) {
		got, err := settle(Config{File: file}, false)
		if got.run != "/f/run" || got.mount != "" || got.private != "" || err != nil {
			t.Errorf("settings\n got %+v, %v\nwant run and mount of the file", got, err)
		}
	})
	t.Run("for a moment", func(t *testing.T) {
		got, err := settle(Config{Mount: "none"}, true)
		defer os.RemoveAll(got.private)
		if got.private == "" || got.run != got.private+"/run" || got.state != got.private+"/state" || err != nil {
			t.Errorf("settings with a socket passed in\n got %+v, %v\nwant a private directory", got, err)
		}
	})
	t.Run("with a socket of systemd", func(t *testing.T) {
		t.Setenv("NOTIFY_SOCKET", "/run/systemd/notify")
		got, err := settle(Config{File: writeConfig(t, "")}, true)
		if got.private != "" || got.run != defaultPlaces().run || err != nil {
			t.Errorf("settings under systemd\n got %+v, %v\nwant the usual directories", got, err)
		}
	})
}

// TestStoreIsNoOrigin opens a snapstore that is an origin, or leads to one, which --force
// would overwrite.
func TestStoreIsNoOrigin(t *testing.T) {
	origin := makeOrigin(t, 4096)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(origin, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{origin, link} {
		set, err := settle(Config{
			Origin: []string{"vda=" + origin}, Store: []string{"mem", "file:" + path}, Force: new(true),
			File: writeConfig(t, ""), Run: t.TempDir(), State: t.TempDir(),
		}, false)
		if err != nil {
			t.Fatal(err)
		}
		pool := store.NewPool()
		err = (&service{set: set}).openStores(t.Context(), pool, new(members))
		wantError(t, "snapstore", err, "snapstore file:"+path+" is the origin of device vda")
		if err := pool.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestSettleRefuses(t *testing.T) {
	for _, tc := range []struct {
		name string
		conf Config
		err  string
	}{
		{"two devices of one name", Config{Origin: []string{"/a/x.img", "/b/x.img"}}, "origins /a/x.img and /b/x.img are both named x: write NAME=/b/x.img"},
		{"bad tracking block", Config{DeviceConfig: DeviceConfig{TrackingBlock: 1}}, "tracking block of 1 bytes is not a power of two from 4KiB to 16MiB"},
		{"negative idle timeout", Config{IdleTimeout: new(time.Duration(-1))}, "idle timeout -1ns: must not be negative"},
		{"store of no kind", Config{Store: []string{"tape:/dev/st0"}}, `snapstore "tape:/dev/st0": it is none of mem[:LIMIT], file:PATH[:LIMIT] and dev:PATH`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.conf.File = writeConfig(t, "")
			tc.conf.Run, tc.conf.State = t.TempDir(), t.TempDir()
			_, err := settle(tc.conf, false)
			wantError(t, "settings", err, tc.err)
		})
	}
}

func TestMakePrivate(t *testing.T) {
	for _, tc := range []struct {
		name string
		make func(path string) error
		err  string // a part of the error; "" where it is accepted
	}{
		{"missing, with parents", func(string) error { return nil }, ""},
		{"ours", func(p string) error { return mkdir(p, 0o700) }, ""},
		{"readable for others", func(p string) error { return mkdir(p, 0o755) }, ""},
		{"link of ours", func(p string) error { return errors.Join(mkdir(p+"-real", 0o700), os.Symlink(p+"-real", p)) }, ""},
		{"writable for others", func(p string) error { return mkdir(p, 0o777) }, "is open to the writes of others (mode 0777)"},
		{"file", func(p string) error { return errors.Join(mkdir(filepath.Dir(p), 0o700), os.WriteFile(p, nil, 0o600)) }, "is not a directory"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "parent", "dir")
			if err := tc.make(path); err != nil {
				t.Fatal(err)
			}
			err := makePrivate(path)
			if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("make %s\n got %v\nwant %q", path, err, tc.err)
			}
			if st, err := os.Stat(path); tc.name == "missing, with parents" && (err != nil || st.Mode().Perm() != 0o700) {
				t.Errorf("directory that was made\n got %v, %v\nwant mode 0700", st.Mode(), err)
			}
		})
	}
	t.Run("somebody else's", func(t *testing.T) {
		path := t.TempDir()
		if err := os.Chown(path, 65534, -1); errors.Is(err, syscall.EPERM) {
			lacking(t, "only root can give directories away")
		}
		wantError(t, "directory of another user", makePrivate(path), "directory "+path+" belongs to user 65534, not to us")
	})
}

// mkdir makes a directory of exactly that mode.
func mkdir(path string, mode os.FileMode) error {
	return errors.Join(os.MkdirAll(path, 0o700), os.Chmod(path, mode))
}
