// The tree as scripts see it (docs/design.md, section 3.2).

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestTree(t *testing.T) {
	needRoot(t)
	dir := scratch(t)
	d := serve(t, makeOrigin(t, dir, "vda", 4*miB), makeOrigin(t, dir, "vdb", 8*miB+512))
	mkdir(t, d.snapshot("nightly"))
	number := func(device string) string { return read(t, d.snapshot("nightly", device+".cbt", "number")) }

	want := strings.Fields("devices snapshots snapshots/latest version snapshots/nightly snapshots/nightly/created snapshots/nightly/state")
	for _, device := range []string{"vda", "vdb"} {
		live, image := "devices/"+device, "snapshots/nightly/"+device
		for _, name := range strings.Fields(". origin size state uri cbt") {
			want = append(want, filepath.Join(live, name))
		}
		want = append(want, cbtFiles(live+"/cbt", number(device))...)
		want = append(want, image+".img", image+".state", image+".cbt")
		want = append(want, image+".qcow2", image+"@"+number(device)+".qcow2")
		want = append(want, cbtFiles(image+".cbt", number(device))...)
	}
	got := strings.Fields(run(t, "find", d.mount, "-mindepth", "1", "-printf", "%P\n"))
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("find\n got %s\nwant %s", got, want)
	}

	for _, tc := range []struct{ path, want string }{
		{"version", `^blksnap \d+\.\d+\.\d+`},
		{"devices/vdb/origin", "^" + regexp.QuoteMeta(filepath.Join(dir, "vdb.img")) + "$"},
		{"devices/vdb/size", "^8389120$"},
		{"devices/vdb/uri", "^" + regexp.QuoteMeta(d.uri("vdb")) + "$"},
		{"devices/vdb/state", "^ok$"},
		{"devices/vdb/cbt/block_size", "^65536$"},
		{"devices/vdb/cbt/generation", `^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`},
		{"devices/vdb/cbt/number", "^" + number("vdb") + "$"},
		{"devices/vdb/cbt/since/" + number("vdb"), "^$"},
		{"devices/vdb/cbt/since/all", "^0 4194304 data$"},
		{"snapshots/nightly/state", "^ok$"},
		{"snapshots/nightly/vdb.state", "^ok$"},
		{"snapshots/nightly/vdb.cbt/number", "^" + number("vdb") + "$"},
		{"snapshots/nightly/vdb.cbt/since/all", "^0 4194304 data$"},
	} {
		t.Run(tc.path, func(t *testing.T) {
			if got := read(t, d.mount, tc.path); !regexp.MustCompile(tc.want).MatchString(got) {
				t.Errorf("\n got %s\nwant %s", got, tc.want)
			}
		})
	}
	if link, err := os.Readlink(d.snapshot("latest")); err != nil || link != "nightly" {
		t.Errorf("latest is a link to %q (%v), want nightly", link, err)
	}
	if image, err := os.Stat(d.snapshot("latest", "vdb.img")); err != nil || image.Size() != 8*miB+512 || image.Mode() != 0o600 {
		t.Errorf("vdb.img: %v, %v, want %d bytes and mode 0600", image, err, 8*miB+512)
	}
	if tracking, err := os.Stat(d.device("vdb", "cbt", "map")); err != nil || tracking.Size() != 129 {
		t.Errorf("the map of 8 MiB and a sector: %v, %v, want 129 bytes", tracking, err)
	}
	checkText(t, d.mount)
}

// cbtFiles are the files of a cbt directory while one snapshot exists.
func cbtFiles(dir, number string) (paths []string) {
	for _, name := range []string{"base", "block_size", "generation", "map", "number", "since", "since/all", "since/" + number} {
		paths = append(paths, dir+"/"+name)
	}
	return paths
}

// checkText checks of every text file in the tree that it has the size that
// stat shows, and ends in a newline where it is not empty.
func checkText(t *testing.T, tree string) {
	t.Helper()
	files := run(t, "find", tree, "-type", "f", "!", "-name", "*.img", "!", "-name", "*.qcow2", "!", "-name", "map")
	for path := range strings.Lines(files + "\n") {
		path = strings.TrimSuffix(path, "\n")
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(content)) != st.Size() {
			t.Errorf("%s has %d bytes, stat says %d", path, len(content), st.Size())
		}
		if len(content) > 0 && !strings.HasSuffix(string(content), "\n") {
			t.Errorf("%s does not end in a newline: %q", path, content)
		}
	}
}

// The moment of a snapshot is the time of its files, and created says it.
func TestTimes(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 4*miB)
	before := time.Now()
	mkdir(t, d.snapshot("s1"))
	after := time.Now()

	created, err := time.Parse(time.RFC3339Nano, read(t, d.snapshot("s1", "created")))
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(d.snapshot("s1", "vda.img"))
	if err != nil {
		t.Fatal(err)
	}
	for name, at := range map[string]time.Time{"created": created, "mtime of the image": st.ModTime()} {
		if at.Before(before.Add(-time.Second)) || at.After(after.Add(time.Second)) {
			t.Errorf("%s is %v, want from %v to %v", name, at, before, after)
		}
	}
}

// df of the tree shows the snapstore.
func TestDf(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 16*miB, "--store", "mem:8MiB")
	var before, after unix.Statfs_t
	if err := unix.Statfs(d.mount, &before); err != nil {
		t.Fatal(err)
	}
	if got := int64(before.Blocks) * before.Bsize; got != 8*miB {
		t.Errorf("df shows a size of %d, want %d", got, 8*miB)
	}
	mkdir(t, d.snapshot("s1"))
	p := make([]byte, miB)
	Stamp(p, "vda", 0, 2)
	if err := d.open("vda").writeAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Statfs(d.mount, &after); err != nil {
		t.Fatal(err)
	}
	if got := int64(before.Bfree-after.Bfree) * before.Bsize; got < miB || got > 2*miB {
		t.Errorf("after 1 MiB was preserved df shows %d bytes less free, want 1 to 2 MiB", got)
	}
}

// What the commands print, the tree says as well.
func TestCommandsPrint(t *testing.T) {
	needRoot(t)
	d, origin := serveOrigin(t, 4*miB)
	if got, want := d.blksnap("snapshot", "create", "s1"), "s1"; got != want {
		t.Errorf("snapshot create printed %q, want %q", got, want)
	}
	unnamed := d.blksnap("snapshot", "create")
	if _, err := time.Parse("20060102T150405Z", unnamed); err != nil {
		t.Errorf("a snapshot without a name: %v", err)
	}

	device := d.json("device", "list")
	if len(device) != 1 {
		t.Fatalf("device list printed %v, want one device", device)
	}
	for key, want := range map[string]any{"name": "vda", "origin": origin, "size": 4. * miB, "state": "ok", "uri": d.uri("vda")} {
		if got := device[0][key]; got != want {
			t.Errorf("device list, %s\n got %v\nwant %v", key, got, want)
		}
	}
	var names []string
	for _, s := range d.json("snapshot", "list") {
		names = append(names, fmt.Sprint(s["name"]))
	}
	slices.Sort(names)
	want := []string{"s1", unnamed}
	slices.Sort(want)
	if !slices.Equal(names, want) {
		t.Errorf("snapshot list\n got %v\nwant %v", names, want)
	}

	d.blksnap("cbt", "mark", "vda", "--range", "1048576:65536")
	number := read(t, d.device("vda", "cbt", "number"))
	if got, want := d.blksnap("cbt", "extents", "vda", "--since", number), "1048576 65536 data"; got != want {
		t.Errorf("extents after mark\n got %s\nwant %s", got, want)
	}
	generation := read(t, d.device("vda", "cbt", "generation"))
	if got := d.blksnap("cbt", "show", "vda"); !strings.Contains(got, generation) {
		t.Errorf("cbt show does not mention %s:\n%s", generation, got)
	}
	d.blksnap("cbt", "reset", "vda")
	if read(t, d.device("vda", "cbt", "generation")) == generation {
		t.Error("cbt reset kept the generation")
	}
	d.blksnap("snapshot", "destroy", "s1", unnamed)
	if got, want := snapshots(t, d), "[]"; got != want {
		t.Errorf("snapshots after destroying them\n got %s\nwant %s", got, want)
	}
	for _, args := range [][]string{{"store", "list"}, {"events"}, {"version"}} {
		if d.blksnap(args...) == "" {
			t.Errorf("blksnap %v printed nothing", args)
		}
	}
	if got := d.json("store", "list"); len(got) == 0 {
		t.Error("store list --json printed nothing")
	}
}

// What snapshots hold of the snapstore, and what they share.
func TestSnapshotShow(t *testing.T) {
	needRoot(t)
	d, _ := serveOrigin(t, 4*miB, "--store", "mem:16MiB")
	live := d.open("vda")
	p := make([]byte, 64*kiB)
	for i, name := range []string{"older", "newer"} {
		mkdir(t, d.snapshot(name))
		if err := live.writeAt(p, int64(i)*miB); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name          string
		holds, shares float64
	}{
		{"older", 64 * kiB, 64 * kiB}, // it alone needs what was written before newer was taken
		{"newer", 0, 64 * kiB},
	} {
		v := d.json("snapshot", "show", tc.name)[0]
		image := v["images"].([]any)[0].(map[string]any)
		if image["holds"] != tc.holds || image["shares"] != tc.shares {
			t.Errorf("%s holds and shares\n got %v and %v\nwant %v and %v", tc.name, image["holds"], image["shares"], tc.holds, tc.shares)
		}
		if ns, _ := v["held_up_ns"].(float64); ns <= 0 {
			t.Errorf("%s held writes up for %v ns, want some", tc.name, v["held_up_ns"])
		}
		if got, want := fmt.Sprint(v["created"]), read(t, d.snapshot(tc.name, "created")); !sameTime(got, want) {
			t.Errorf("%s was created\n got %s\nwant %s", tc.name, got, want)
		}
		store := v["store"].(map[string]any)
		if store["size"] != 16.*miB || store["free"] != 16.*miB-128*kiB {
			t.Errorf("size and free space of the store\n got %v and %v\nwant 16 MiB, and 128 KiB less", store["size"], store["free"])
		}
		rate, _ := store["rate"].(float64)
		left, _ := store["left_ns"].(float64)
		if rate <= 0 || left <= 0 {
			t.Errorf("right after writes the store fills at a rate of %v, full in %v ns; want both above 0", store["rate"], store["left_ns"])
		}
	}
	if got, want := d.blksnap("snapshot", "show", "older"), "full in "; !strings.Contains(got, want) {
		t.Errorf("snapshot show\n got %s\nwant it to say %q", got, want)
	}
}

// sameTime says whether two texts are the same time in RFC 3339.
func sameTime(a, b string) bool {
	x, errX := time.Parse(time.RFC3339Nano, a)
	y, errY := time.Parse(time.RFC3339Nano, b)
	return errX == nil && errY == nil && x.Equal(y)
}

// Only its owner may read the tree, unless --allow-other says otherwise.
func TestAllowOther(t *testing.T) {
	needRoot(t)
	configured := filepath.Join(scratch(t), "blksnap.yaml")
	write(t, configured, []byte("allow-other: true\n"))
	for _, tc := range []struct {
		args []string
		want error
	}{
		{nil, syscall.EACCES},
		{[]string{"--allow-other"}, nil},
		{[]string{"--config", configured}, nil},
		{[]string{"--config", configured, "--no-allow-other"}, syscall.EACCES},
		{[]string{"--config", configured, "--allow-other=false"}, syscall.EACCES},
	} {
		t.Run(fmt.Sprint(tc.args), func(t *testing.T) {
			d, _ := serveOrigin(t, miB, tc.args...)
			// `test -e` as somebody else: 0 yes, 1 no.
			cmd := d.command()
			cmd.Path, cmd.Args = "/bin/cat", []string{"cat", filepath.Join(d.mount, "version")}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: nobody}
			if r := end(t, cmd); (r.status == 0) != (tc.want == nil) {
				t.Errorf("cat by another user: status %d, %swant %v", r.status, r.stderr, tc.want)
			}
		})
	}
}
