# Run in the guest, as root, once in each boot: the command, and then off, or into the next boot if a test wants one.
exec > /dev/virtio-ports/fwd.output 2>&1
boot=$(cat /lab/boot 2>/dev/null || echo 0)

finish() {
  echo "$1" > /lab/out/status
  sync
  systemctl --no-block poweroff
  exit
}

# As it comes: the guest may be ended.
journalctl -b -f -n all --no-pager -o short-precise >> /lab/out/journal &

export FWD_VM_BOOT="$boot" FWD_LAB_ROOT=/ FWD_LAB_PROGRAMS=/usr/lib/fwd/bin FWD_LAB_PATIENCE=5
export HOME=/root PATH="/opt/fwd-test/bin:/usr/sbin:/usr/bin:/sbin:/bin"
timeout 240 systemctl is-system-running --wait > /lab/out/boot-$boot
systemd-analyze >> /lab/out/boot-$boot 2>&1
echo "--- boot $boot: Debian $(cat /etc/debian_version), Linux $(uname -r), strongSwan $(dpkg-query -W -f='${Version}' charon-systemd)," \
  "$(python -V); $(head -1 /lab/out/boot-$boot) after $(cut -d' ' -f1 /proc/uptime) s"

# The first boot finds what the package's installation has made on the image.
if [ -e /lab/new ]; then
  cp -a /lab/new/. / && rm -rf /lab/new && systemctl daemon-reload || finish 71
fi
sh /lab/command || echo $? >> /lab/failures
# A test that goes on in the next boot has left the command for it.
if [ -e /lab/again ]; then
  mv /lab/again /lab/command
  echo $((boot + 1)) > /lab/boot
  sync
  systemctl --no-block reboot
  exit
fi
finish "$(head -1 /lab/failures 2>/dev/null || echo 0)"
