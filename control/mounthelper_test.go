package control

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestIsMount(t *testing.T) {
	for _, tc := range []struct {
		name string
		args []string
		want bool
	}{
		{"mount.fuse3", []string{"blksnap", "/run/blksnap", "-o", "rw,origin=/srv/vda.img,dev,suid"}, true},
		{"source like a command", []string{"serve", "/run/blksnap", "-o", "rw"}, true},
		{"serve", []string{"serve", "--mount", "/run/blksnap", "/srv/vda.img"}, false},
		{"relative", []string{"blksnap", "run", "-o", "rw"}, false},
		{"no options", []string{"blksnap", "/run/blksnap"}, false},
		{"nothing", nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := IsMount(tc.args); got != tc.want {
				t.Errorf("IsMount(%q)\n got %v\nwant %v", tc.args, got, tc.want)
			}
		})
	}
}

func TestServeArgs(t *testing.T) {
	for _, tc := range []struct {
		name, options string
		want          string // arguments after serve --mount=/m, separated by spaces
		err           string
	}{
		{"as in the manual", "rw,origin=vda=/srv/vda.img,store=file:/srv/blksnap.store,dev,suid", "--store=file:/srv/blksnap.store -- vda=/srv/vda.img", ""},
		{"several", "origin=/a.img,store=mem:1GiB,origin=b=/b.img,store=file:/s", "--store=mem:1GiB --store=file:/s -- /a.img b=/b.img", ""},
		{"switches", "allow-other,force", "--allow-other --force --", ""},
		{"switched off", "no-allow-other,force=false", "--no-allow-other --force=false --", ""},
		{"as FUSE has it", "allow_other,default_permissions", "--allow-other --", ""},
		{"what is for others", "defaults,_netdev,nofail,noauto,user,x-systemd.requires=foo,comment=hm,nosuid,relatime", "--", ""},
		{"unknown ones are for serve to refuse", "orign=/a.img", "--orign=/a.img --", ""},
		{"comma in a path", `origin=a=/srv/a\,b.img,force`, "--force -- a=/srv/a,b.img", ""},
		{"path like a flag", "origin=--force", "-- --force", ""},
		{"nothing", "", "--", ""},
		{"empty origin", "origin=", "", "mount option origin is empty: write origin=[NAME=]PATH"},
		{"origin alone", "origin", "", "mount option origin is empty: write origin=[NAME=]PATH"},
		{"read-only", "ro,origin=/a.img", "", "mount option ro: the tree is mounted for writing, mkdir and rmdir need it"},
		{"another mount point", "mount=/x", "", `mount option "mount=/x": the mount point is /m`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := serveArgs("/m", tc.options)
			if tc.err != "" {
				wantError(t, tc.options, err, tc.err)
				return
			}
			want := append([]string{"serve", "--mount=/m"}, strings.Fields(tc.want)...)
			if diff := cmp.Diff(want, got); diff != "" || err != nil {
				t.Errorf("options %q: %v, -want +got:\n%s", tc.options, err, diff)
			}
		})
	}
}

func TestAwaitReady(t *testing.T) {
	for _, tc := range []struct {
		name, said string
		words      string
		ready      bool
	}{
		{"ready", "vda  1  nbd+unix:///vda\nready\n", "", true},
		{"refused", "blksnap: origin /x: is empty\n", "blksnap: origin /x: is empty", false},
		{"refused after the devices", "vda  1  nbd\nblksnap: no\n", "blksnap: no", false},
		{"gone", "", "", false},
		{"device called ready", "ready  1  nbd\n", "ready  1  nbd", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			words, ready := awaitReady(strings.NewReader(tc.said))
			if words != tc.words || ready != tc.ready {
				t.Errorf("after %q\n got %q, %v\nwant %q, %v", tc.said, words, ready, tc.words, tc.ready)
			}
		})
	}
}
