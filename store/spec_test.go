package store

import (
	"path/filepath"
	"testing"
)

func TestParseSpec(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       Spec
	}{
		{"memory", "mem", Spec{Kind: Mem}},
		{"memory with limit", "mem:64MiB", Spec{Mem, "", 64 << 20}},
		{"file", "file:/srv/store", Spec{Kind: File, Path: "/srv/store"}},
		{"relative file", "file:store", Spec{Kind: File, Path: "store"}},
		{"file with limit", "file:/srv/store:10GiB", Spec{File, "/srv/store", 10 << 30}},
		{"limit in bytes", "file:/srv/store:65536", Spec{File, "/srv/store", 65536}},
		{"colon in the path", "file:/srv/a:b", Spec{Kind: File, Path: "/srv/a:b"}},
		{"colon and limit", "file:/srv/a:b:1TiB", Spec{File, "/srv/a:b", 1 << 40}},
		{"path that ends like a limit", "file:/srv/1GiB:1GiB:64KiB", Spec{File, "/srv/1GiB:1GiB", 64 << 10}},
		{"number in a directory", "file:/srv/a:5/store", Spec{Kind: File, Path: "/srv/a:5/store"}},
		{"colon at the end", "file:/srv/a:", Spec{Kind: File, Path: "/srv/a:"}},
		{"device", "dev:/dev/sdb", Spec{Kind: Dev, Path: "/dev/sdb"}},
		{"device with colons", "dev:/dev/disk/by-path/pci-0000:00:1GiB", Spec{Kind: Dev, Path: "/dev/disk/by-path/pci-0000:00:1GiB"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ParseSpec(tc.text)
			if err != nil || got != tc.want {
				t.Fatalf("ParseSpec(%q)\n got %+v, %v\nwant %+v", tc.text, got, err, tc.want)
			}
			if again, err := ParseSpec(got.String()); err != nil || again != got {
				t.Errorf("ParseSpec(%q), which String returned\n got %+v, %v\nwant %+v", got, again, err, got)
			}
		})
	}
}

func TestParseSpecRefuses(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"nothing", "", `snapstore "": it is none of mem[:LIMIT], file:PATH[:LIMIT] and dev:PATH`},
		{"unknown kind", "tape:/dev/st0", `snapstore "tape:/dev/st0": it is none of mem[:LIMIT], file:PATH[:LIMIT] and dev:PATH`},
		{"path alone", "/srv/store", `snapstore "/srv/store": it is none of mem[:LIMIT], file:PATH[:LIMIT] and dev:PATH`},
		{"file without path", "file:", `snapstore "file:": it names no path`},
		{"file with only a limit", "file::1GiB", `snapstore "file::1GiB": it names no path`},
		{"device without path", "dev", `snapstore "dev": it names no path`},
		{"limit of zero", "mem:0", `snapstore "mem:0": limit 0 is too small: a chunk takes 64KiB`},
		{"file limit of zero", "file:/a:0", `snapstore "file:/a:0": limit 0 is too small: a chunk takes 64KiB`},
		{"less than a chunk", "mem:65535", `snapstore "mem:65535": limit 65535 is too small: a chunk takes 64KiB`},
		{"negative limit", "file:/a:-5", `snapstore "file:/a:-5": limit: "-5" is not a size such as 512, 64KiB, 10GiB or 1TiB`},
		{"memory of nonsense", "mem:lots", `snapstore "mem:lots": limit: "lots" is not a size such as 512, 64KiB, 10GiB or 1TiB`},
		{"unit of nonsense", "file:/a:10GB", `snapstore "file:/a:10GB": limit: "10GB" is not a size such as 512, 64KiB, 10GiB or 1TiB`},
		{"too large", "mem:9999999TiB", `snapstore "mem:9999999TiB": limit: size "9999999TiB" is too large`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ParseSpec(tc.text)
			if err == nil || err.Error() != tc.want {
				t.Errorf("ParseSpec(%q)\n got %+v, %v\nwant %s", tc.text, got, err, tc.want)
			}
		})
	}
}

func TestSizes(t *testing.T) {
	for _, tc := range []struct {
		text, again string
		want        int64
	}{
		{"0", "0", 0},
		{"512", "512", 512},
		{"4096", "4KiB", 4096},
		{"64KiB", "64KiB", 65536},
		{"1536KiB", "1536KiB", 1536 << 10},
		{"1024MiB", "1GiB", 1 << 30},
		{"10GiB", "10GiB", 10 << 30},
		{"1TiB", "1TiB", 1 << 40},
		{"8191PiB", "8191PiB", 8191 << 50},
	} {
		got, err := ParseSize(tc.text)
		if err != nil || got != tc.want {
			t.Errorf("ParseSize(%q)\n got %d, %v\nwant %d", tc.text, got, err, tc.want)
		}
		if again := FormatSize(tc.want); again != tc.again {
			t.Errorf("FormatSize(%d)\n got %s\nwant %s", tc.want, again, tc.again)
		}
	}
	for _, text := range []string{"", "KiB", "-1", "+1", "1.5GiB", "1 GiB", "1gib", "0x10", "1_000", "8192PiB", "99999999999999999999", "9223372036854775808"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("ParseSize(%q)\n got %d\nwant an error", text, got)
		}
	}
}

// TestOpen opens what a spec says, and its traits say how to open it again.
func TestOpen(t *testing.T) {
	t.Run("device", func(t *testing.T) {
		openAgain(t, "dev:"+loopDevice(t, sparseFile(t, t.TempDir(), 4<<20)), Dev)
	})
	openAgain(t, "mem:1MiB", Mem)
	openAgain(t, "file:"+filepath.Join(t.TempDir(), "store")+":1MiB", File)
	if part, err := Open(Spec{Kind: "tape"}, false); err == nil {
		part.Close()
		t.Errorf("Open of an unknown kind: no error")
	}
}

func openAgain(t *testing.T, text string, kind Kind) {
	t.Helper()
	spec, err := ParseSpec(text)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		part, err := Open(spec, false)
		if err != nil {
			t.Fatalf("Open(%v): %v", spec, err)
		}
		if got := part.Traits().Spec; got.Kind != kind || got.String() != text {
			t.Errorf("spec of the open part\n got %v\nwant %s", got, text)
		}
		spec = part.Traits().Spec
		if err := part.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
