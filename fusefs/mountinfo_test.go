package fusefs

import "testing"

func TestParseMount(t *testing.T) {
	for _, tc := range []struct {
		name, line string
		want       mount
		ok         bool
	}{
		{"tree", "36 35 0:52 / /run/blksnap rw,nosuid - fuse.blksnap blksnap rw,user_id=0\n",
			mount{"0:52", "/run/blksnap", fsType}, true},
		{"optional fields", "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext4 /dev/sda rw\n",
			mount{"98:0", "/mnt2", "ext4"}, true},
		{"escaped", `36 35 98:0 / /a\040b\011c\134d rw - ext4 /dev/sda rw`,
			mount{"98:0", "/a b\tc\\d", "ext4"}, true},
		{"escape cut off", `36 35 98:0 / /a\04 rw - ext4 /dev/sda rw`,
			mount{"98:0", `/a\04`, "ext4"}, true},
		{"empty", "", mount{}, false},
		{"no separator", "36 35 98:0 / /a rw", mount{}, false},
		{"nothing behind", "36 35 98:0 / /a rw - ", mount{}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, ok := parseMount(tc.line)
			if got != tc.want || ok != tc.ok {
				t.Errorf("parseMount(%q)\n got %+v %v\nwant %+v %v", tc.line, got, ok, tc.want, tc.ok)
			}
		})
	}
}
